"""cifar_accel: an exact, fast image-classification trainer on Hugging Face Accelerate and timm."""

__version__ = "0.1.0"
