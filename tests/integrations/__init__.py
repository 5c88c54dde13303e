"""Tests of dia_fast behind other people's interfaces."""
