"""The forward process, the denoiser, the samplers, and the loop that drives them. All in sigma
space: x = x0 + sigma * eps.
"""
