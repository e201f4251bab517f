"""The laws: what must hold for everything that exists, over every network of the zoo. They name no block."""
