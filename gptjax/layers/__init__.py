"""The parts that variants swap: each module is one question with several answers."""
