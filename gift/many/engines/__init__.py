"""Where runs run: in this process, in processes of this machine, under Slurm."""
