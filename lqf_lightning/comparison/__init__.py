"""What `lqf-compare` is made of: answers of two models, flips between them, averages of their weights, one page."""
