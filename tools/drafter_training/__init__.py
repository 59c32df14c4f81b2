"""Training of EAGLE-2 drafters and Medusa heads; the command is tools/train_drafter.py.

The one place of the project that uses PyTorch (and transformers, for the target's hidden states).
"""
