"""SmolLM2-135M-Instruct as a checkpoint, made from a package that ships its weights."""
