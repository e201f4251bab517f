"""Tiny networks written as different users would write them; `zoo.ZOO` lists them."""
