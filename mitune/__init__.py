"""MI-TUNE: point-wise mutual information for text-to-image alignment, implemented and examined."""
