"""The programs whose command lines contain secrets, and where: one table for each kind of place.

All entries are regular expressions. A program is matched by its name, perhaps after a folder, and
by those of its subcommands that matter.
"""

OPTIONS = {
    r"curl": r"-[A-Za-z]*[uU]|--user|--proxy-user|--pass|(?:-b|--cookie)(?=[\s=]*['\"]?[^\s=]+=)"
    r"|(?:-[A-Za-z]*E|--(?:proxy-)?cert)(?=[\s=]*['\"]?[^\s:]+:[^\s:])",
    r"skopeo|podman|buildah": r"--(?:src-|dest-)?creds",
    r"xh|https?": r"-a|--auth",
    r"wget": r"--user|--header-token",
    r"[\w.-]+\s+(?:registry\s+)?login": r"-p",
    r"sshpass|snowsql|mongo\w*|ncftp\w*|twine|poetry\s+publish|user(?:add|mod)": r"-p",
    r"mysql\w*|mariadb[\w-]*": r"-p(?=\S)",
    r"redis-cli": r"-a|--pass",
    r"ldap\w+": r"-w",
    r"smbclient|rpcclient": r"-U",
    r"sqlcmd|bcp|ipmitool": r"-P",
    r"lftp": r"-u\s*['\"]?[\w.@-]+,",
    r"plink|pscp|psftp": r"-pw",
    r"xfreerdp": r"/p:",
    r"snmp\w+": r"-[cAX]",
    r"unzip|zip|7z\w*|(?:un)?rar": r"-P|-h?p(?=\S)",
    r"openssl": r"-[kK]",
    r"ssh-keygen": r"-[NP]",
    r"anaconda|doctl": r"-t",
    r"gh\s+secret\s+set": r"-b|--body",
    r"az\s+keyvault\s+secret\s+set": r"--value",
    r"aws\s+(?:secretsmanager|ssm)": r"--secret-string|--value",
    r"databricks\s+secrets": r"--string-value",
    r"kaggle\s+config\s+set": r"-v",
}
"""Programs and those of their options, besides the ones named like a secret, that take one."""

_URL = r"(?:[\w-]+://\S+|\S*\$\S+)"

ARGUMENTS = [
    r"wandb\s+login",
    r"vault\s+login",
    r"rclone\s+obscure",
    # NAME URL ACCESS_KEY SECRET_KEY; both are secrets, and one of them may be a reference
    rf"mc(?:li)?\s+(?:alias\s+set|config\s+host\s+add)\s+(?:\S+\s+){{0,6}}?{_URL}",
    rf"mc(?:li)?\s+(?:alias\s+set|config\s+host\s+add)\s+(?:\S+\s+){{0,6}}?{_URL}\s+\S+",
    r"redis-cli\s+(?:\S+\s+){0,8}?(?:AUTH|CONFIG\s+SET\s+(?:requirepass|masterauth))",
    r"redis-cli\s+(?:\S+\s+){0,8}?AUTH\s+\S+",
    r"openssl\s+passwd(?:\s+-salt\s+\S+)?",
    r"smbclient\s+\S+",
    r"htpasswd\s+-\w*b\w*\s+(?:(?<!n\s)(?<!n\w\s)\S+\s+)?\S+",
    r"rabbitmqctl\s+(?:add_user|change_password)\s+\S+",
    r"ansible-vault\s+encrypt_string",
    r"ngrok\s+(?:authtoken|config\s+add-authtoken)",
    r"poetry\s+config\s+pypi-token\.\S+",
    r"poetry\s+config\s+http-basic\.\S+\s+\S+",
    r"keyctl\s+add\s+\S+\s+\S+",
    r"wpa_passphrase\s+\S+",
]
"""The words before an argument that is a secret. Options may follow them."""

SETTINGS = [
    r"rclone\s+config\s+(?:create|update|password)",
    r"dvc\s+remote\s+(?:modify|add)",
    r"(?:git|npm|pnpm|yarn|pip3?|conda|mamba|poetry|snow|gcloud|az)\s+config",
    r"p?npm\s+set",
    r"nmcli|mysqladmin|wg\s+set",
]
"""Commands in which the name of a setting is followed by its value, as in `password X`."""

PAIRS = [
    r"(?:kubectl|oc|k)\b[^;&|\n]*?\screate\s+secret",
    r"(?:fly|flyctl|modal|databricks|wrangler|gh|supabase)\s+secrets?\s+(?:set|create|put|import)",
    r"vault\s+(?:kv\s+(?:put|patch)|write)",
]
"""Commands in which every NAME=VALUE is a secret."""

READERS = r"""(?:
    (?<![\w-])--?[\w-]*(?:stdin|passphrase-fd|with-token)\b
    | (?<![\w./-])(?:login|(?:ch|smb|vnc)?passwd|kinit|cryptsetup|su)(?![\w.-])
    | \b(?:sudo\s+(?:-\w+\s+)*-\w*S | secrets?\s+(?:set|put|create) | secret-tool\s+store
      | pass\s+insert)\b
)"""
"""In verbose form, the words of a command that reads a secret from standard input."""
