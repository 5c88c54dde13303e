"""From the arguments of a call to speech: one way for a single call, a batch, a long script and a stream."""
