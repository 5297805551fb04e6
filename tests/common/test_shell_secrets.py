"""Secrets in the shell commands of `launch.setup` are masked; references to them are kept."""

import time

import pytest

from hqqtrain.common.errors import UserError
from hqqtrain.common.secrets import mask_command, mask_secrets
from hqqtrain.config.infra import LaunchConfig
from hqqtrain.launch.slurm.validate import refuse_secrets

SECRET_COMMANDS = [
    "mysql --password S3cret -u me",
    "docker login -p S3cret -u me reg.io",
    "docker login reg.io -u me -p S3cret",
    "docker login -u me --password S3cret",
    "podman login -p=S3cret",
    "curl -u me:S3cret https://x/y",
    "curl -sSLu me:S3cret https://x",
    "curl --user 'me:S3cret' x",
    "curl -ume:S3cret x",
    "curl -H 'Authorization: Basic S3cret' x",
    'curl -H "PRIVATE-TOKEN: S3cret" x',
    "curl -H 'X-Api-Key: S3cret' y",
    "export DB_PASS=S3cret",
    "AZURE_STORAGE_KEY=S3cret ./x",
    "sshpass -p S3cret ssh h",
    "sshpass -pS3cret ssh h",
    "mysql -pS3cret -u me",
    "redis-cli -a S3cret ping",
    "wandb login S3cret",
    "wandb login --relogin S3cret",
    "hf auth login --token S3cret",
    "aws configure set aws_secret_access_key S3cret",
    "setenv MY_TOKEN S3cret",
    "set -gx MY_TOKEN S3cret",
    "echo S3cret | docker login --password-stdin",
    "printf '%s' S3cret | docker login -u me --password-stdin",
    '{"api_key": "S3cret"}',
    "os.environ['HF_TOKEN'] = 'S3cret'",
    "openssl -passin pass:S3cret",
    "AccountKey=S3cret;EndpointSuffix=x",
    "git config http.extraheader 'AUTHORIZATION: basic S3cret'",
    "kubectl create secret generic a --from-literal=password=S3cret",
    "SSHPASS=S3cret",
    "GITHUB_PAT=S3cret",
    "gpg --passphrase S3cret",
    'curl -d \'{"password":"S3cret"}\' x',
    "helm registry login -p S3cret h",
    "launch.setup=['docker login -p S3cret','x']",
    'docker login -p "S3cret yy" r',
    "/usr/bin/curl -u me:S3cret z",
    "wget --user=me --password=S3cret x",
    "http -a me:S3cret x",
    "skopeo login -p S3cret",
    "smbclient -U me%S3cret //h",
    "MY_ENCRYPTION_KEY=S3cret",
    "az login --service-principal -u a -p S3cret --tenant t",
    "-----BEGIN RSA PRIVATE KEY-----\nS3cret\n-----END RSA PRIVATE KEY-----",
]

HARMLESS_COMMANDS = [
    "docker run -u 1000:1000 -p 80:80 x",
    "python -u train.py",
    "srun -p gpu x; mkdir -p /a/b; ssh -p 22 h",
    "sudo -u me x",
    "curl -sSL https://x/y -o z",
    "mysql -u me",
    "docker login -p $PW r",
    'curl -u "me:$PW" x',
    "curl -u $CRED x",
    'mysql --password "$PW"',
    'wandb login "$(cat f)"',
    "echo $PW | docker login --password-stdin",
    "docker login --password-stdin < f",
    "export PUBLIC_KEY=abc",
    "hf auth login (or set HF_TOKEN).",
    "module load cuda; export OMP_NUM_THREADS=1",
    "quant.overrides={*.key:{nbits:4}}",
    "tok --token-study x --tokens 5",
]


@pytest.mark.parametrize("command", SECRET_COMMANDS)
def test_a_secret_in_a_command_is_masked_and_refused_in_a_batch_file(command: str):
    for text in (mask_secrets(command), *mask_command([command, f"launch.setup=[{command}]"])):
        assert "S3cret" not in text
        assert "***" in text
    assert mask_secrets(mask_secrets(command)) == mask_secrets(command)
    with pytest.raises(UserError, match="would contain a secret") as caught:
        refuse_secrets([], LaunchConfig(setup=[command]))
    assert "S3cret" not in str(caught.value)


@pytest.mark.parametrize("command", HARMLESS_COMMANDS)
def test_a_command_without_a_secret_is_kept_and_allowed(command: str):
    assert mask_secrets(command) == command
    refuse_secrets([], LaunchConfig(setup=[command]))


@pytest.mark.parametrize(
    "name", ["DB_PASS", "AZURE_STORAGE_KEY", "SSHPASS", "GITHUB_PAT", "MY_DSN", "BASIC_AUTH"]
)
def test_the_value_of_a_secret_variable_is_masked_in_any_key(name: str, monkeypatch):
    monkeypatch.setenv(name, "correct horse")
    config = {"track": {"group": "of correct horse"}, "data": {"source": "/x/correct horse/y"}}
    assert "horse" not in str(mask_secrets(config))
    assert mask_secrets({name.lower(): "any"}) == {name.lower(): "***"}


@pytest.mark.parametrize("name", ["PUBLIC_KEY", "BYPASS", "MANPATH", "SSH_ASKPASS", "MY_TOKENS"])
def test_an_ordinary_variable_is_no_secret(name: str, monkeypatch):
    monkeypatch.setenv(name, "correct horse")
    assert mask_secrets("a correct horse") == "a correct horse"


@pytest.mark.parametrize(
    "text",
    ["a-" * 50_000, "--" + "a" * 100_000, "echo " + "'a' " * 10_000, "curl " + '"a" ' * 10_000,
     "docker login " + "\\a" * 10_000, "'" * 20_000, "echo " + '"' * 20_000 + "|", "$(" * 5000],
    ids=range(8),
)  # fmt: skip
def test_masking_takes_linear_time(text: str):
    start = time.perf_counter()
    mask_secrets(text)
    assert time.perf_counter() - start < 5
