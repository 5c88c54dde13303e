"""Checks and predictions: the doctor, the roofline model and its pictures. Measurements are in `bench`."""
