"""What earlier releases wrote: runs that every later release has to replay, and to go on from, to the same bits."""
