"""What happens around every call; each module is one concern, `chain` puts them around the servicers."""
