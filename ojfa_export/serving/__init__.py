"""An HTTP server over the engine, in the protocol that OpenAI's clients speak."""
