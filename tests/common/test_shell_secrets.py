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
    "skopeo copy --src-creds me:S3cret a b",
    "podman pull --creds=me:S3cret a",
    "curl --cert me.pem:S3cret x",
    "curl -sE me.pem:S3cret x",
    "vncpasswd -f <<< S3cret",
    "echo S3cret | su - me -c ls",
    "export JWT=S3cret",
    "smbclient -U me%S3cret //h",
    "MY_ENCRYPTION_KEY=S3cret",
    "az login --service-principal -u a -p S3cret --tenant t",
    "export MY_TOKEN+=S3cret",
    "MY_TOKEN+='S3cret yy' ./x",
    "MY_TOKEN[0]=S3cret",
    "docker login -u me --password-stdin <<< S3cret",
    "docker login --password-stdin <<<'S3cret yy'",
    "gh auth login --with-token <<< S3cret",
    "wandb login <<< S3cret",
    "cat <<< S3cret | docker login --password-stdin",
    "read -r MY_TOKEN <<< S3cret",
    "sudo -S apt install x <<< S3cret",
    "gpg --batch --passphrase-fd 0 -d x <<< S3cret",
    "docker login --password-stdin <<EOF\nS3cret\nEOF",
    "echo me:S3cret | chpasswd",
    "echo S3cret | base64 | docker login --password-stdin",
    "echo S3cret > ~/.cache/huggingface/token",
    "echo 'h:5432:db:u:S3cret' >> ~/.pgpass",
    "machine h login u password S3cret",
    'echo "machine h login u password S3cret" >> ~/.netrc',
    r"printf 'machine h\nlogin u\npassword S3cret\n' > ~/.netrc",
    "machine h\n  login u\n  password S3cret",
    "default login anonymous password S3cret",
    "docker login -p $(echo S3cret) r",
    'docker login -p "$(printf S3cret)" r',
    "docker login -p ${PW:-S3cret} r",
    "export MY_TOKEN=$(echo S3cret)",
    "export MY_TOKEN=$(printf '%s' S3cret)",
    "docker login -p $(echo -n 'S3cret') r",
    "rclone config create r webdav url https://x user me pass S3cret",
    "rclone config create r s3 provider AWS access_key_id A secret_access_key S3cret",
    "rclone config update r pass=S3cret",
    "rclone config create r b2 account A key S3cret",
    "rclone obscure S3cret",
    "mc alias set minio http://h:9000 ACCESS S3cret",
    "mc alias set minio http://h:9000 S3cret $SECRET_KEY",
    "mc alias set minio http://h:9000 $ACCESS_KEY S3cret",
    "mc alias set --api S3v4 minio $URL ACCESS S3cret",
    "dvc remote modify --local r password S3cret",
    "dvc remote modify r access_key_id S3cret",
    'curl -d "{\\"password\\":\\"S3cret\\"}" x',
    "curl --data-raw 'user=me&password=S3cret' x",
    "curl -H 'Cookie: S3cret' x",
    'wget --header="Cookie: a=1; session=S3cret" x',
    "curl -b session=S3cret x",
    "curl -H 'apikey: S3cret' x",
    "openssl enc -d -aes-256-cbc -k S3cret -in a",
    "openssl enc -aes-256-cbc -pass pass:S3cret -in a",
    "openssl passwd -6 S3cret",
    "ssh-keygen -t ed25519 -N S3cret -f k",
    "ssh-keygen -p -P S3cret -N '' -f k",
    "snowsql -a x -u me -p S3cret",
    "mongosh -u me -pS3cret",
    "mysqladmin -u root password S3cret",
    "sqlcmd -S h -U me -P S3cret",
    "lftp -u me,S3cret h",
    "kubectl create secret generic a --from-literal=u=v --from-literal=k=S3cret",
    "kubectl -n x create secret generic a --from-literal 'k=S3cret'",
    "vault kv put secret/a k=S3cret",
    "fly secrets set K=S3cret",
    "restic --password-command 'echo S3cret' backup",
    "export RESTIC_PASSWORD_COMMAND='printf S3cret'",
    "psql postgres://u:S3cret@h",
    "redis-cli AUTH S3cret",
    "redis-cli -h h AUTH me S3cret",
    "redis-cli CONFIG SET requirepass S3cret",
    "openssl rsa -passin 'pass:two S3cret'",
    "curl -H 'Ocp-Apim-Subscription-Key: S3cret' x",
    "python -c 'import wandb; wandb.login(key=\"S3cret\")'",
    "python -c \"from huggingface_hub import login; login('S3cret')\"",
    'machine h login u password "two S3cret"',
    "mcli alias set minio http://h:9000 ACCESS S3cret",
    "git config --global user.password S3cret",
    "npm config set //registry.npmjs.org/:_authToken S3cret",
    "poetry config pypi-token.pypi S3cret",
    "htpasswd -b f me S3cret",
    "htpasswd -nb me S3cret",
    "unrar x -hpS3cret a.rar",
    "7zz x -pS3cret a.7z",
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
    "tar -xpf a.tar; tar -p -xf b.tar; mkdir -p a && cp -p x y",
    "docker run -p 8080:80 -k x; python -m http.server -p 8000",
    "pip install -U -r requirements.txt; make -k -j 8",
    "curl -k -b cookies.txt -H 'Accept: text/html' -d '{\"user\":\"me\"}' x",
    "openssl version; openssl rand -hex 16; openssl x509 -in a.pem -noout",
    "ssh-keygen -t ed25519 -N '' -f k; ssh-keygen -R host",
    "kubectl create secret generic a --from-file=k=/x/y; kubectl get secret a",
    "kubectl create configmap a --from-literal=k=v",
    "mc alias list; mc cp a minio/b; mc alias set m $URL $ACCESS $SECRET",
    "dvc remote modify r url s3://b/x; dvc pull -r origin",
    "rclone config create r s3 provider AWS region us-east-1; rclone copy a b",
    "restic --password-command 'cat /x/pw' backup; rsync --password-file=/x a b",
    "cat <<< hello; read -r line <<< hello; grep x <<< y",
    'wandb login <<< "$WANDB_API_KEY"; docker login --password-stdin <<< $PW',
    "echo hi | tee login.txt; echo done > /x/token_count.txt",
    "docker login --password-stdin <<EOF\n$PW\nEOF",
    "docker login -p $(echo $PW) r; docker login -p $(printf '%s' \"$PW\" | tr a b) r",
    "redis-cli -h h -p 6379 ping; psql -h h -p 5432 -U me db; mysql -u me -p db",
    "git config --global user.name me; npm config set always-auth true",
    "zip -r a.zip b; 7z x a.7z; unzip -o a.zip -d b; vault kv get secret/a",
    "wandb login\npython x; vault login\nls",
    "openssl enc -pass file:/x -in a; openssl enc -pass env:PW -in a",
    "docker build --secret id=npm,src=/x/.npmrc .",
    "dvc remote modify r auth basic; redis-cli SET key value",
    "export PATH+=:/x; export CUDA_VISIBLE_DEVICES+=,1; ulimit -n 4096",
    "sudo -u me -k x; srun -p gpu -N 2 x; ssh -i k -p 22 h",
    "the password of machine h; the default password is long",
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
     "docker login " + "\\a" * 10_000, "'" * 20_000, "echo " + '"' * 20_000 + "|", "$(" * 5000,
     "login <<" * 5000, "machine h login u " * 4000, "mc alias set a " * 4000, "curl -b " * 5000,
     "kubectl create secret a=" * 3000, "cookie: a" * 5000, "echo a > b" * 5000],
    ids=range(15),
)  # fmt: skip
def test_masking_takes_linear_time(text: str):
    start = time.process_time()
    mask_secrets(text)
    assert time.process_time() - start < 5
