"""This package decides, in ints, which pages move between the device, host memory and the disk."""
