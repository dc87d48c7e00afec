"""The HTTP process of Lamina: OpenAI-compatible answers from what the engine says (spec: serving 14-17)."""
