"""The zoft command: parse, call one library function, print."""
