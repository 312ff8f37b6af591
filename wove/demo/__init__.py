"""The demo: real servers, real workers, and work worth sending to them."""
