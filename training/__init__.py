"""How a bundle is made: corpus, towers, dictionaries, modality tables, report."""
