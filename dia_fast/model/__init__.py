"""The model: its configuration, weights, buffers and decode step. Text, sound and requests are elsewhere."""
