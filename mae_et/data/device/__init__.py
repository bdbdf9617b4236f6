"""Decode, crop and resize images on a device, ahead of training (`efficiency.decode`)."""
