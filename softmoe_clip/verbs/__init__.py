"""What each verb of the command line asks for, and the one function it calls."""
