"""Planted bugs by the part of niwaki they live in. Each says which law finds it, on which networks."""
