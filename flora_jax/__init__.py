"""FLoRA: fused forward-backward adapters for Llamas, in JAX."""
