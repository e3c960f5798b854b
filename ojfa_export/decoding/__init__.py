"""What every part says of decoding: exits, policies, sampling, options, what a head gives."""
