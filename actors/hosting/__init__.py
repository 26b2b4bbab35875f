"""An actor's work in a process below it, which the actor calls over a socket. Nothing here imports Ray."""
