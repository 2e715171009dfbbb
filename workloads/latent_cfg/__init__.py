"""Class-conditional latent diffusion with classifier-free guidance."""
