"""The embedded trainer: a small diffusion model, real images and a LoRA, to try an optimizer within minutes.

It stands in for sd-scripts: option names, LoRA format and the training loop on accelerate are the same.
"""
