"""What the computer has and does: devices, memory, speeds, allocation failures, copies, units, meters, kernels.

Owns every question to the hardware, the operating system and the allocator: no other package asks for the type of
a device. Imports nothing of the package but `errors`. Hands on amounts in bytes, copies of tensors, and results of
functions that may run out of memory.
"""
