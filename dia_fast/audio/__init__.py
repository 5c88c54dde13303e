"""Sound: samples in and out of files, and the codec between samples and codes."""
