"""What each way of decoding would cost and give on this machine, and which to take."""
