module github.com/KarpelesLab/slirp

go 1.25
