"""Functions that read and write the files of networks: weights, cards, and text from files."""
