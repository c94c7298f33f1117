"""Gender bias of the towers: how gendered an embedding is, what ablating features does to it, and how to tell.

`gender` and `ablation` are the definition; `audit` says what an ablation did to labelled items, with paired intervals,
recalibrated thresholds, a matched null and a retrained probe. What the gateway needs (`ablation`, `calibration`,
`gender`, `plan`) imports neither torch nor scipy, so nothing is imported here.

Source: "Multi-Faceted Multimodal Monosemanticity" (arXiv 2502.14888) for the ablation; the controls are ours.
"""
