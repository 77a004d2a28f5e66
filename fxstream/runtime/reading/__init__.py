"""The boxes that tiles read of images: views on the device, copies from host memory, blocks of arrays."""
