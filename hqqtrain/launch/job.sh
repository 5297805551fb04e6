# Slurm sends USR1 some time before the time limit, and the run then saves a checkpoint. Exit codes:
# 0 done, 3 preempted after saving. `end` requeues a preempted job, but not without limit, see
# hqqtrain/launch/attempt.py. When a node fails, Slurm itself requeues the job.
folder="$("$python" -m hqqtrain --check "${words[@]}")"
"$python" -m hqqtrain.launch.attempt begin "$folder"

# srun does not inherit the number of cores per task from sbatch, so it is passed on.
code=0
srun --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
  "$python" -m hqqtrain "${words[@]}" || code=$?

exec "$python" -m hqqtrain.launch.attempt end "$folder" "$code"
