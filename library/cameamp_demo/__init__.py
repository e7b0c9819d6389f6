"""The embedded trainer: a small diffusion model, real images and a LoRA, to try an optimizer in minutes anywhere.

It is a stand-in for sd-scripts that keeps its option names, its LoRA format and its loop over accelerate.
"""
