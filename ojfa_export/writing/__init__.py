"""The model in torch, frozen, and text that it writes itself."""
