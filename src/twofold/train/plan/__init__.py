"""What a run will take: parameters, FLOPs, memory, time and cost, before anything is spent."""
