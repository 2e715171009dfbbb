"""Text to kanji: a small Stable Diffusion trained from scratch."""
