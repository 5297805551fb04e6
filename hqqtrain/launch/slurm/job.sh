# USR1 comes some time before the end, and the run saves. Exit codes: 0 done, 3 preempted, all saved.
# `end` requeues a job that was preempted, but not for ever: see hqqtrain/launch/slurm/requeue.py. When a
# node fails, slurm requeues by itself.
folder="$("$python" -m hqqtrain --check "${words[@]}")"
"$python" -m hqqtrain.launch.slurm.requeue begin "$folder"

# srun does not take the cores of a task over from sbatch.
code=0
srun --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
  "$python" -m hqqtrain "${words[@]}" || code=$?

exec "$python" -m hqqtrain.launch.slurm.requeue end "$folder" "$code"
