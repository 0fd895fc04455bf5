"""Training of the pocket model: tools/train_pocket.py is its command line."""
