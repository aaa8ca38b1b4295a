"""From the arguments of a call to a kernel: pattern, tensors and labels become one `Call`."""
