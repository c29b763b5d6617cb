"""Units and text <-> a language model: vocabulary, prompts, instructions, generation."""
