"""What is said of features: modality, monosemanticity, names and cards, by judges that never saw the towers."""
