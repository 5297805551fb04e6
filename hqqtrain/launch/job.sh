# USR1 comes some time before the end, and the run saves. Exit codes: 0 done, 3 preempted, all saved.
# When a node fails, slurm requeues by itself. The last task of an array has the array's own
# SLURM_JOB_ID, which stands for all of its tasks.
job="${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}"
folder="$("$python" -m hqqtrain --check "${words[@]}")"
told() { cat "$folder/status.json" 2>/dev/null || true; }
saved() { printf '%s\n' "$folder"/checkpoints/*; }
before="$(told)" had="$(saved)" code=0

# srun does not take the cores of a task over from sbatch.
srun --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
  "$python" -m hqqtrain "${words[@]}" || code=$?

# Ranks that srun had to end make its code larger than the run's own.
now="$(told)"
if ((code > 3)) && [[ $now != "$before" && $now =~ '"exit_code": '([0-9]+) ]]; then
  code="${BASH_REMATCH[1]}"
fi
if ((code == 3)); then
  if [[ $before == *'"status": "preempted"'* && $(saved) == "$had" ]]; then
    echo "hqqtrain: preempted twice with nothing saved in between; give it more launch.time." >&2
  else
    echo "hqqtrain: preempted; requeued, to go on where it was." >&2
    scontrol requeue "${job:-$SLURM_JOB_ID}"
  fi
fi
exit "$code"
