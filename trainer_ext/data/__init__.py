"""Text corpora, tokenizers, packing, model presets and metrics for the training scripts."""
