"""Networks: plain modules that know nothing about training."""
