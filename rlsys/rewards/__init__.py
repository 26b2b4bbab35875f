"""How a reward comes to be: runs graders in processes that can be killed, and adds up the reward terms."""
