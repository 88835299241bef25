"""What each stage after pre-training adds to the training loop."""
