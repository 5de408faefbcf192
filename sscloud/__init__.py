"""What training and serving share: labels, images, the network, bundles, inference, shapes."""

__version__ = "0.1.0"
